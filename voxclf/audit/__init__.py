"""Which labels are probably wrong. ``voxclf audit``.

`label_audit.py` runs all of it, `slices.py` finds slices that lie elsewhere, `regions.py` finds contradicted regions,
`page.py` writes them down.
"""

from voxclf.audit.label_audit import Audit, audit_labels

__all__ = ["Audit", "audit_labels"]
