"""AuxDPO's offsets: the null space they are held to, and what a variant takes from published sketches."""
