"""Pipeline folders of diffusers: encoders, sampling, export and the comparison with stock diffusers."""
