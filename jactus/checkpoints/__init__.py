"""Files: everything that is written, and how `from_pretrained` reads a compressed model back.

In: a compressed model, or tensors with a JSON header. Out: folders that transformers reads after `import jactus`, files of
cores, and the one file format of statistics, plans and snapshots. Begin in `checkpoint.py` (save a model, swap cores);
`quantizer.py` has what config.json says of the layers, and the reload; `reload.py` checks that what was
written can be read, `storage.py` is the file format.
"""
