"""The web page of `flextok demo`. Images come and go as data inside messages: no client's path is
ever opened, nothing lands on disk and nothing is asked of another machine.

upload.py, guard.py and messages.py keep out and bound what Gradio lets in, studio.py does the work,
markup.py writes HTML, page.py is the page in Gradio."""
