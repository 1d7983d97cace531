"""Mixed precision under a limit: sense what each choice harms and costs, predict, allocate, check."""
