"""What a layer with an order computes, whatever its family: rows, products, segments, and the record of it."""
