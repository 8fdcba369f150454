"""An exported model without torch: ONNX Runtime, tokenizers and numpy."""
