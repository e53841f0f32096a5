"""One module per implementation; importing one imports its framework."""
