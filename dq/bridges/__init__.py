"""Files that others wrote, and models that other libraries quantized: read weight by weight, their codes kept or not.

gguf, safe            a file: names, shapes, and each tensor as it is `stored`
blocks                GGUF's types as dq's formats
layouts, naming       which rows of a file's tensors make a tensor of the model
loading               a denoiser out of a file: `dq.from_file`
adopting              a model with layers of diffusers' GGUF quantizer or of torchao
"""
