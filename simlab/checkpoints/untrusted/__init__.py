"""Readers of files from strangers: nothing in them is executed, and every claimed size is checked.

safetensors: headers of safetensors files. pickle: torch's pickles as data. torch_zip: archives of
torch.save. dcp: torch's distributed checkpoints. yaml: one section of a YAML file.
"""
