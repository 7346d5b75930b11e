"""Machines to try whimbrel with: `whimbrel run whimbrel_examples.records:machine`, and what `whimbrel demo` runs."""
