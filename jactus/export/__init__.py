"""Out to where models are served: what jactus made, in forms that need no jactus.

In: a model with low-rank layers, in eval mode. Out: a folder that other programs read. Begin in `exporter.py` (`can_export`,
`export_model`); `graphs.py` traces a model to ONNX and to an ExportedProgram, `load_model.py` is the file that the "torch" form
has beside its weights, and imports torch and transformers alone.
"""
