"""Where Penstock meets what people already use."""
