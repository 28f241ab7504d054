# SPDX-License-Identifier: Apache-2.0
"""Shipped as optimum/commands/register/register_calibprune.py, where optimum-cli finds the commands of its plugins."""

from optimum_calibprune.cli import CalibPruneCommand


REGISTER_COMMANDS = [CalibPruneCommand]
