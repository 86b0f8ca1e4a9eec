"""Taking a pretrained backbone elsewhere: timm, Hugging Face, TorchScript, ONNX."""
