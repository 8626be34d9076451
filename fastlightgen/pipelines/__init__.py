"""Pipeline folders of diffusers: encode and decode clips, export a student, compare it with stock diffusers."""
