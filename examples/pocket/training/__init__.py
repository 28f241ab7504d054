# SPDX-License-Identifier: Apache-2.0
"""What `train.py` is made of. Imports torch, numpy and transformers, and nothing else that has to be installed."""
