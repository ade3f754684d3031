"""What a program's moves cost the fabric: hops, words on the busiest link, words on every link."""
