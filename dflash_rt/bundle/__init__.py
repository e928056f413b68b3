"""A bundle on disk.

- ``folder``: :class:`Bundle`, the checked folder.
- ``manifest``: the dataclasses of manifest.json.
- ``read``: reading and writing it; ``schema``: strict JSON from and to dataclasses.
- ``rules``: rules between its fields; ``contract``: tensors of each graph; ``graph_names``: their names.
- ``engine_sets``: records of built engines; ``engine_match``: the set that fits a machine.
- ``dtypes``: their names in numpy and ONNX; ``onnx_scan``: where an ONNX file has its weights.
"""
