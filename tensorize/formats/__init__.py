"""What a weight can become: one object a format, asked for by name or by spec."""
