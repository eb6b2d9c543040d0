"""What operators use: ``mdkv plan`` before a server runs, ``mdkv top`` while it does."""
