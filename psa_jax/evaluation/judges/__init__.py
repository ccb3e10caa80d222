"""What reads pictures: detectors, an oracle, and whatever else says of a picture what it shows."""
