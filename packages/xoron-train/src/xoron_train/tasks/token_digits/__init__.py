"""The data set `token-digits`: scanned digits to read and to draw, and who judges what is drawn."""
