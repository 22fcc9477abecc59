"""The web page of `flextok demo`. Pictures come and go as data inside messages: no client's path is
ever opened, nothing lands on disk and nothing is asked of another machine.

upload.py and guard.py keep hostile input out, studio.py does the work, markup.py writes HTML;
page.py alone knows Gradio."""
