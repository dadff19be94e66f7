"""What ``lunashm doctor`` looks at, one noun a file: each yields tasks, and knows nothing of how they are run or shown.

``check`` has the words and runs tasks in this process; ``apart`` runs those that load foreign libraries in another.
"""
