"""The failures a caller may want to catch, under one base class.

Bad arguments raise ``ValueError``/``TypeError``; missing files ``FileNotFoundError``. What stands here is what
goes wrong although the arguments were of the right kind.
"""


class VoxclfError(Exception):
    """Base of every failure that voxclf raises on purpose."""


class OutputExistsError(VoxclfError):
    """The output is already there and was made by another job."""


class ModelError(VoxclfError):
    """A model folder is damaged, was changed by hand, or does not fit the volume it is applied to."""


class FormatError(VoxclfError):
    """A file is damaged or in a layout that voxclf cannot read."""


class BlockError(VoxclfError):
    """A block failed; the message names it, and everything finished before it is kept."""


class CertificateError(VoxclfError):
    """Probabilities of a network are not those of its patches: something computes wrongly on this machine."""
