"""The loop around DeepSpeed that sft and preference training share."""
