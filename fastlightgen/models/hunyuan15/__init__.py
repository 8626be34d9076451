"""HunyuanVideo-1.5: HunyuanVideo's double blocks over tokens of two text encoders and an image encoder."""
