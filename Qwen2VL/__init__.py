"""The Qwen2-VL family."""
