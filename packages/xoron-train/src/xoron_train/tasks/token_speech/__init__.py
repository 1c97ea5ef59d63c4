"""The data set `token-speech`: spoken digits to hear and to say, and who judges what is said."""
