"""The web page of `flextok demo`. It is three static files and one request, whose answer streams. A
picture comes as data inside that request: no client's path is opened, nothing is written to disk,
nothing is kept between requests and nothing is asked of another machine.

upload.py and guard.py bound what comes in, source.py states what may be asked for, decoder.py and
studio.py do the models' work, page.py serves it, and page.html, page.css and page.js are what the
browser runs."""
