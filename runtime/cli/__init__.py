"""What the three command lines share: options, help, completions, output, and a clean ending."""
