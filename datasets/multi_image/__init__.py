"""Questions about one picture, turned into questions about one of several: sequences, collages, pictures in pictures."""
