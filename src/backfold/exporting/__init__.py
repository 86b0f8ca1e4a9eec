"""Taking a pretrained backbone elsewhere: timm, Hugging Face, ONNX, torch.export."""
