"""The commands of the command line, one file each; `nestlearn.cli` lists and runs them."""
