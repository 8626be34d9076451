"""The border: every file from outside is opened, limited and checked here, before anything believes what it says."""
