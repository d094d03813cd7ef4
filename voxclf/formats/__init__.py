"""Readers and writers, one file format per module: the only place that knows axis orders other than zyx.

Each reader opens a path and gives an :class:`~voxclf.formats.source.ArraySource`: an array of shape
(C, Z, Y, X) that is read box by box. ``detect.open_source`` picks the reader; ``voxclf.volume`` adds what all
formats share.
"""
