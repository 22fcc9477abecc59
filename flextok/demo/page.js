// The page of `flextok demo`. It asks for all images of one list of tokens at once and keeps them,
// so that the slider has nothing to wait for. The state lies in the form and in the address.
const $ = id => document.getElementById(id);
const form = $('form'), value = form.elements;
const count = k => `${k} token${k === 1 ? '' : 's'}`;
const {sources, examples, max_bytes, max_name} = await (await fetch('models.json')).json();
const state = new URLSearchParams(location.hash.slice(1));

let source;                      // one of sources
let picture = Object.keys(examples)[0];  // the name of an example, or a picture as a data URL
let shown = empty();             // what has arrived of the list of tokens on the page
let wanted = Number(state.get('k')) || 16;  // the number of tokens to show
let follows = !state.has('k');   // whether it grows with what is generated
let running = new AbortController();

function empty() {
  return {title: '', original: '', indices: [], frames: new Map(), maps: new Map(), seed: 0};
}

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function say(id, text = '') {
  if ($(id).textContent !== text) $(id).textContent = text;
}

// --- asking ---------------------------------------------------------------------------------------

function fail(text = '', field = null) {
  say('error', text);
  for (const one of form.querySelectorAll('[aria-invalid]')) one.removeAttribute('aria-invalid');
  field?.setAttribute('aria-invalid', 'true');
}

async function draw() {
  running.abort();
  busy(false);
  const mine = running = new AbortController();
  const wrong = [...$('settings').querySelectorAll('input')].find(one => !one.checkValidity());
  const input = {picture, class: value.class.value, prompt: value.prompt.value.trim(), none: ''};
  const field = {picture: $('file'), class: value.class, prompt: value.prompt}[source.kind];
  fail();
  say('status');
  if (wrong) {
    wrong.closest('details').open = true;
    fail(`${wrong.parentElement.textContent.trim()}: ${wrong.validationMessage}`, wrong);
    wrong.focus();
    return;
  }
  if (source.kind === 'prompt' && !input.prompt) {
    fail('Write what the image shall show.', field);
    field.focus();
    return;
  }
  const options = group => Object.fromEntries([...$('settings').querySelectorAll('input')]
    .filter(one => one.name.startsWith(group))
    .map(one => [one.name.slice(group.length + 1), Number(one.value)]));
  const asked = {source: sources.indexOf(source), value: input[source.kind],
    seed: Number(value.seed.value), decoding: options('decoding'), sampling: options('sampling')};
  const name = picture.startsWith('data:') ? 'Your picture' : picture;
  const next = Object.assign(empty(), {seed: asked.seed, source, picture,
    title: {picture: name, none: 'A generated image'}[source.kind] ?? `“${asked.value}”`});
  let begun = false;
  const take = message => {
    if (message.error) throw new Error(message.error);
    if (message.note) { say('status', message.note); return; }
    if (!begun) {  // until here the page shows what it showed before
      begun = true;
      follows ||= Boolean(shown.source);  // but the first images are those of the address
      shown = next;
      $('slider').max = source.lengths.length - 1;
      $('length').hidden = source.lengths.length < 2;
      show_all();
    }
    if (message.original) shown.original = message.original;
    if (message.indices) { shown.indices = message.indices; show_chips(); }
    for (const one of message.frames ?? []) shown.frames.set(`${one.k}/${one.seed}`, one);
    if (message.map) shown.maps.set(message.map.k, message.map);
    if (follows && source.kind !== 'picture' && message.frames && !message.map) wanted = message.frames.at(-1).k;
    show();
  };
  busy(true);
  save();
  try {
    const answer = await fetch('draw', {method: 'POST', body: JSON.stringify(asked),
      headers: {'content-type': 'application/json'}, signal: mine.signal});
    if (!answer.ok) throw new Error(await answer.text());
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    for (let text = ''; ;) {
      const {done, value: more} = await reader.read();
      const lines = (text += more ?? '').split('\n');
      text = lines.pop();
      for (const line of lines) take(JSON.parse(line));
      if (done) break;
    }
  } catch (error) {
    if (error.name === 'AbortError') return;
    picture = shown.picture ?? picture;  // the last that was good
    save();
    fail(error instanceof TypeError ? 'The server does not answer: is it running?' : error.message,
      field);
  } finally {
    if (mine === running) busy(false);
  }
}

function draw_if_asked() {  // an empty prompt waits to be written
  if (source.kind !== 'prompt' || value.prompt.value) draw();
}

function busy(is) {  // what is shown meanwhile is what was asked for before
  $('stop').disabled = !is;
  for (const id of ['view', 'open']) $(id).setAttribute('aria-busy', is);
}

// --- showing --------------------------------------------------------------------------------------

const frame = (k, seed = shown.seed) => shown.frames.get(`${k}/${seed}`);
const nearest = (lengths, k) => lengths.filter(one => one <= k).at(-1) ?? lengths[0];

function show_all() {
  const {source} = shown;
  say('title', shown.title);
  $('original').hidden = source.kind !== 'picture';
  $('film').replaceChildren(...source.film.map(k => make('li', {}, make('button', {
    type: 'button', onclick: () => { follows = false; wanted = k; show(); save(); },
  }, make('img', {alt: ''}), make('span', {textContent: count(k)})))));
  const seeds = Array.from({length: source.seeds}, (_, i) => shown.seed + i);
  $('open').hidden = seeds.length < 2;
  $('seeds').replaceChildren(...[...seeds.map(seed => `seed ${seed}`), 'what differs'].map(text =>
    make('figure', {}, make('img', {alt: text}), make('figcaption', {textContent: text}))));
}

function show_chips() {
  const {source} = shown;
  $('tokens').hidden = !shown.indices.length;
  $('chips').replaceChildren(...shown.indices.map((index, i) => make('li', {
    title: `token ${i + 1} of ${shown.indices.length}`}, make('b', {textContent: index}),
    make('i', {textContent: index.toString(2).padStart(source.bits, '0')}))));
}

function set(img, url) {
  if (url && img.getAttribute('src') !== url) img.src = url;
  img.style.visibility = img.hasAttribute('src') ? 'visible' : 'hidden';
}

function show() {
  const {source} = shown;
  if (!source) return;
  const made = source.lengths.filter(k => frame(k));
  if (!made.length) return;
  $('view').setAttribute('aria-busy', 'false');
  $('open').setAttribute('aria-busy', !shown.maps.size && !$('stop').disabled);
  const k = nearest(made, wanted), one = frame(k), total = source.lengths.at(-1);
  set($('image'), one.url);
  $('image').alt = `${shown.title}, decoded from ${count(k)}`;
  say('caption', k < total ? `from the first ${k} of its ${total} tokens` : `from all ${total} tokens`);
  set($('original').querySelector('img'), shown.original);
  $('slider').value = source.lengths.indexOf(nearest(source.lengths, wanted));
  $('slider').setAttribute('aria-valuetext', `${k} of ${total}`);
  const bytes = Math.ceil(k * source.bits / 8), pixels = 3 * source.size ** 2;
  const facts = source.bits ? [`${count(k)} of ${source.bits} bits take ${bytes.toLocaleString('en')} ` +
    `bytes; the pixels take ${pixels.toLocaleString('en')}.`] : [];
  if (one.psnr !== undefined) facts.push(`Likeness to the picture: PSNR ${one.psnr.toFixed(1)} dB.`);
  if (one.sharp) facts.push(`Sharpness: ${one.sharp.toFixed(2)} of the picture's.`);
  say('facts', facts.join('\n'));
  [...$('film').children].forEach((item, i) => {
    set(item.querySelector('img'), frame(source.film[i])?.url);
    item.hidden = !frame(source.film[i]);
    item.firstChild.toggleAttribute('aria-current', source.film[i] === nearest(source.film, k));
  });
  $('download').href = one.url;
  $('download').download = `flextok-${k}.png`;
  const few = nearest(source.film, k), map = shown.maps.get(few);
  say('open-title', `What ${count(few)} ${few === 1 ? 'leaves' : 'leave'} open`);
  [...$('seeds').children].forEach((figure, i) => {
    const image = figure.querySelector('img');
    image.removeAttribute('src');
    set(image, i < source.seeds ? frame(few, shown.seed + i)?.url : map?.url);
    if (i === source.seeds && map) {
      figure.querySelector('figcaption').textContent = `what differs: ${map.mean.toFixed(0)} of 255`;
    }
  });
  say('tokens-title', `${k} of ${total} tokens`);
  say('tokens-note', `Each token is one of ${source.vocabulary.toLocaleString('en')} numbers, ` +
    `below as ${source.bits} bits. The coloured ones make the image above.`);
  [...$('chips').children].forEach((chip, i) => {
    chip.classList.toggle('on', i < k);
    chip.ariaHidden = i < k ? null : 'true';
  });
}

// --- the form and the address ---------------------------------------------------------------------

function save() {
  const kept = new URLSearchParams(new FormData(form));
  for (const kind of ['class', 'prompt']) if (kind !== source.kind) kept.delete(kind);
  if (source.kind === 'picture' && !picture.startsWith('data:')) kept.set('picture', picture);
  kept.set('k', wanted);
  if ($('pixels').checked) kept.set('pixels', 1);
  history.replaceState(null, '', `#${kept}`);
  for (const one of $('examples').children) {
    one.setAttribute('aria-pressed', source.kind === 'picture' && one.title === picture);
  }
}

function choose(number) {  // a source
  source = sources[number];
  for (const one of form.querySelectorAll('[class^=for-]')) {
    one.hidden = !one.classList.contains(`for-${source.kind}`);
  }
  value.class.replaceChildren(...source.classes.map(name => make('option', {textContent: name})));
  $('suggestions').replaceChildren(...source.examples.map(text => make('button', {
    type: 'button', textContent: text, onclick: () => { value[source.kind].value = text; draw(); }})));
  if (source.examples.length) value[source.kind].value = source.examples[0];
  $('settings').replaceChildren($('settings').firstElementChild, ...['decoding', 'sampling'].flatMap(group =>
    source.fields[group].map(one => make('label', {},
      `${group === 'decoding' ? 'Decoder' : 'Generator'} ${one.label}`,
      make('input', {type: 'number', name: `${group}.${one.name}`, required: true, value: one.value,
        min: one.low, max: one.high, step: one.name === 'num_steps' ? 1 : 'any'})))));
  say('about', `${source.name}: ${source.size} x ${source.size} pixels. ` + (source.own ? 'It was ' +
    'trained on emoji only: of other things it draws an emoji, or colours and rough shapes.' : ''));
}

sources.forEach((one, i) => {
  const names = {picture: 'A picture', class: 'A class', prompt: 'A prompt', none: 'Nothing'};
  const input = make('input', {type: 'radio', name: 'source', value: i, checked: !i,
    onchange: () => { choose(i); draw_if_asked(); }});
  const same = sources.filter(other => other.kind === one.kind).length > 1;
  $('sources').append(make('label', {}, input, names[one.kind] + (same ? ` (${one.name})` : '')));
});
for (const [name, url] of Object.entries(examples)) {
  $('examples').append(make('button', {type: 'button', title: name,
    onclick: () => { picture = name; draw(); }}, make('img', {src: url, alt: name})));
}

function send(file) {
  if (!file) return;
  if (file.size > max_bytes) {
    const size = (file.size / 2 ** 20).toFixed(1);
    fail(`${file.name} is too large: ${size} MB, at most ${max_name}`, $('file'));
    return;
  }
  const reader = new FileReader();
  reader.onload = () => { picture = reader.result; draw(); };
  reader.onerror = () => fail(`${file.name} cannot be read`, $('file'));
  reader.readAsDataURL(file);
}
$('file').onchange = () => { send($('file').files[0]); $('file').value = ''; };
for (const kind of ['dragover', 'dragleave', 'drop']) {
  $('drop').addEventListener(kind, event => {
    event.preventDefault();
    $('drop').classList.toggle('over', kind === 'dragover');
    if (kind === 'drop') send(event.dataTransfer.files[0]);
  });
}
form.onsubmit = event => { event.preventDefault(); draw(); };
$('again').onclick = () => { value.seed.value = Number(value.seed.value) + 1; draw(); };
$('stop').onclick = () => { running.abort(); busy(false); show(); say('status', 'Stopped.'); };
$('settings').onchange = draw;
value.class.onchange = draw;
$('slider').oninput = () => {
  follows = false;
  wanted = shown.source.lengths[$('slider').value];
  show();
};
$('slider').onchange = save;
$('pixels').onchange = () => { document.body.classList.toggle('pixels', $('pixels').checked); save(); };

const first = [...value.source].find(one => one.value === state.get('source')) ?? value.source[0];
(first ?? value.source).checked = true;
choose(Number((first ?? value.source).value));
for (const one of form.querySelectorAll('select, input[name]:not([type=radio])')) {
  const own = one.value;
  one.value = state.get(one.name) ?? own;
  if (!one.checkValidity() || (one.options && !one.value)) one.value = own;
}
if (examples[state.get('picture')]) picture = state.get('picture');
$('pixels').checked = state.has('pixels');
$('pixels').onchange();
draw_if_asked();
