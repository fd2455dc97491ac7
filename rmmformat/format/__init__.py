"""The container: bytes of an ``.rmm`` file, as ``spec/rmm-1.md`` has them.

Knows the neutral values of :mod:`rmmformat.model` and nothing of foreign formats or of how a
collection was merged.  ``layout`` holds every offset and record; ``encodings`` the codes of rows;
``index`` the logical content of an index and its bytes; ``reader``, ``rules`` and ``validate`` what
is checked; ``restore`` the reconstruction formula in numpy; ``writer`` new files.
"""
