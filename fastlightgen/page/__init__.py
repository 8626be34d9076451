"""The sections of a run's HTML page, as strings of HTML. The files page.html, style.css and script.js frame them."""
