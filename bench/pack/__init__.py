"""What the node pack has beside its code, made from the nodes themselves: example workflows, pictures, locale files."""
