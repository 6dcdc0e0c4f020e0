"""Speed, measured side by side with others and beside the physical limit."""
