"""What knows nothing of compression: errors, files, text, records, tensors."""
