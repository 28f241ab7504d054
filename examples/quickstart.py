# SPDX-License-Identifier: Apache-2.0
"""Prune the bundled pocket model to 50 % and see what each capability kept: `python examples/quickstart.py`."""

from __future__ import annotations

from optimum_calibprune import CalibPruner


def main() -> None:
    pruner = CalibPruner.from_pretrained("pocket", sparsity="50%")
    record = pruner.prune()
    for kept in record.capabilities.capabilities:
        print(f"{kept.capability:12} dense {kept.dense:.1%}  sparse {kept.sparse:.1%}  retention {kept.retention:.1%}")
    pruner.save_pretrained("pocket-50", overwrite=True)  # loads with plain AutoModelForCausalLM.from_pretrained


if __name__ == "__main__":
    main()
