"""The data set `vision-digits`: scenes of scanned digits and shapes, and questions about them.

- `scans`: scikit-learn's scanned digits, split by writer;
- `scenes`: what lies where in which colour, and the image of it;
- `questions`: what can be asked of a scene, and the answers;
- `dataset`: its splits as conversations.
"""
