// The page of `flextok demo`. It asks for all images of one list of tokens at once and keeps them,
// so that the slider has nothing to wait for. The state lies in the form and in the address.
const $ = id => document.getElementById(id);
const form = $('form'), value = form.elements;
const count = k => `${k} token${k === 1 ? '' : 's'}`;
const {sources, examples, max_bytes, max_name} = await (await fetch('models.json')).json();
const state = new URLSearchParams(location.hash.slice(1));

const TASKS = {
  look: {label: 'Look', from: 'Start from', go: 'Generate', note: 'See what the first tokens of an image determine.'},
  edit: {label: 'Edit', from: 'Take the others from', go: 'Generate', note:
    'Keep the first tokens of a picture, and take the others from a second picture or from a generator.'},
  search: {label: 'Search', from: 'Search for', go: 'Search', note:
    'Generate several candidates, score them, and keep the best.'},
};
const MODES = {  // what the row of images below the slider shows
  look: {title: tokens => `What ${tokens} open`, name: seed => `seed ${seed}`, note:
    'The decoder turns noise into an image that fits the tokens. Each seed gives other noise: what is ' +
    'alike in these images lies in the tokens, what differs the decoder adds by itself. The map sums it ' +
    'up: black is alike, bright differs.'},
  vary: {title: tokens => `Variations that keep the first ${tokens}`, name: (_, i) => `variation ${i + 1}`, note:
    'The generator draws the other tokens anew for each variation, and the decoder starts from the same ' +
    'noise for all of them. The map sums up where they differ: black is alike, bright differs.'},
  blend: {title: tokens => `Between the two pictures, by ${tokens} of each`, name: share => `${share} of the second`, note:
    'The codes of both pictures\u2019 first tokens are averaged, and each average is rounded to the nearest ' +
    'code. The share is the weight of the second picture.'},
};

const VERIFIERS = {
  scenes: 'Here it is a small classifier that was trained on real scenes. The score is the mean logarithm of ' +
    'the probability that it gives to what the prompt asks for: number and arrangement of the objects, ' +
    'what each is, the background.',
  likelihood: 'Here it is the generator itself. The score is the logarithm of the probability that it gives ' +
    'to the candidate\u2019s tokens: it prefers typical images and does not check what they show. ' +
    'The classifier that does so reads scenes of one or two well-known emoji only, such as “a red heart”.',
};

let source;                      // one of sources
const names = Object.keys(examples);
const pictures = {picture: names[0], kept: names[1]};  // names of examples, or data URLs
let latest = 'picture';          // which of them was chosen last
let shown = empty();             // what has arrived of the list of tokens on the page
let wanted = Number(state.get('k')) || 16;  // the number of tokens to show
let follows = !state.has('k');   // whether it grows with what is generated
let running = new AbortController();

function empty() {
  return {title: '', original: '', other: '', indices: [], frames: new Map(), maps: new Map(), seed: 0,
    levels: [], path: [], done: 0};
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
  const task = value.task.value;
  const numbers = [...$('settings').querySelectorAll('input'), ...(task === 'search' ? [value.budget] : [])];
  const wrong = numbers.find(one => !one.checkValidity());
  const input = {picture: pictures.picture, class: value.class.value, prompt: value.prompt.value.trim(), none: ''};
  const field = {class: value.class, prompt: value.prompt}[source.kind];
  fail();
  say('status');
  if (wrong) {
    for (const details of form.querySelectorAll('details')) details.open ||= details.contains(wrong);
    fail(`${wrong.parentElement.textContent.trim()}: ${wrong.validationMessage}`, wrong);
    wrong.focus();
    return;
  }
  if (source.kind === 'prompt' && !input.prompt && task !== 'edit') {
    fail('Write what the image shall show.', field);
    field.focus();
    return;
  }
  const options = group => Object.fromEntries([...$('settings').querySelectorAll('input')]
    .filter(one => one.name.startsWith(group))
    .map(one => [one.name.slice(group.length + 1), Number(one.value)]));
  const asked = {task, source: sources.indexOf(source), value: input[source.kind],
    seed: Number(value.seed.value), decoding: options('decoding'), sampling: options('sampling')};
  if (task === 'edit') asked.kept = pictures.kept;
  if (task === 'search') Object.assign(asked, {method: value.method.value, budget: Number(value.budget.value)});
  const name = key => pictures[key].startsWith('data:') ? 'Your picture' : pictures[key];
  const mode = task !== 'edit' ? 'look' : source.kind === 'picture' ? 'blend' : 'vary';
  const next = Object.assign(empty(), {seed: asked.seed, source, task, mode, pictures: {...pictures},
    lengths: source.lengths, film: source.film, row: Array.from({length: source.seeds}, (_, i) => asked.seed + i),
    title: {blend: `${name('kept')} and ${name('picture')}`, vary: `${name('kept')}, varied`}[mode] ??
      {picture: name('picture'), none: 'A generated image'}[source.kind] ?? `“${asked.value}”`});
  let begun = false;
  const take = message => {
    if (message.error) throw new Error(message.error);
    if (message.note) { say('status', message.note); return; }
    if (!begun) {  // until here the page shows what it showed before
      begun = true;
      follows ||= Boolean(shown.source);  // but the first images are those of the address
      if (follows && task !== 'look' && (task !== shown.task || mode !== shown.mode)) {
        wanted = source.lengths.at(-1) / (task === 'edit' ? 4 : 1);
      }
      shown = next;
      show_all();
    }
    if (message.original) shown.original = message.original;
    if (message.other) shown.other = message.other;
    if (message.row) { shown.row = message.row; show_all(); }
    if (message.lengths) { shown.lengths = shown.film = message.lengths; show_all(); }
    if (message.verifier) say('verifier', VERIFIERS[message.verifier]);
    if (message.level) show_level(message);
    if (message.path) { shown.path = message.path; show_levels(); }
    if (message.indices) { shown.indices = message.indices; show_chips(); }
    for (const one of message.frames ?? []) shown.frames.set(`${one.k}/${one.seed}`, one);
    if (message.map) shown.maps.set(message.map.k, message.map);
    if (follows && task === 'look' && source.kind !== 'picture' && message.frames && !message.map) {
      wanted = message.frames.at(-1).k;
    }
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
    save();
  } catch (error) {
    if (error.name === 'AbortError') return;
    Object.assign(pictures, shown.pictures);  // the last that were good
    save();
    fail(error instanceof TypeError ? 'The server does not answer: is it running?' : error.message,
      error.message.startsWith('that ') ? $(`${latest}-file`) : field);
  } finally {
    if (mine === running) busy(false);
  }
}

function draw_if_asked() {  // an empty prompt waits to be written
  if (source.kind !== 'prompt' || value.prompt.value || value.task.value === 'edit') draw();
}

function busy(is) {  // what is shown meanwhile is what was asked for before
  $('stop').disabled = !is;
  for (const id of ['view', 'open', 'tree']) $(id).setAttribute('aria-busy', is);
}

// --- showing --------------------------------------------------------------------------------------

const frame = (k, seed = shown.seed) => shown.frames.get(`${k}/${seed}`);
const nearest = (lengths, k) => lengths.filter(one => one <= k).at(-1) ?? lengths[0];

function show_all() {
  const {source, mode} = shown;
  say('title', shown.title);
  $('original').hidden = source.kind !== 'picture' && mode === 'look';
  $('other').hidden = mode !== 'blend';
  say('original-name', mode === 'blend' ? 'the first picture' : 'the picture');
  $('slider').max = shown.lengths.length - 1;
  $('length').hidden = shown.lengths.length < 2;
  say('length-name', mode === 'look' ? 'Number of tokens' : 'Tokens that are kept');
  $('film').replaceChildren(...shown.film.map(k => make('li', {}, make('button', {
    type: 'button', onclick: () => { follows = false; wanted = k; show(); save(); },
  }, make('img', {alt: ''}), make('span', {textContent: count(k)})))));
  $('open').hidden = shown.row.length < 2;
  say('open-note', MODES[mode].note);
  const names = shown.row.map(MODES[mode].name);
  $('seeds').replaceChildren(...[...names, ...(mode === 'blend' ? [] : ['what differs'])].map(text =>
    make('figure', {}, make('img', {alt: text}), make('figcaption', {textContent: text}))));
  $('tree').hidden = shown.task !== 'search';
  show_levels();
}

function show_level({level, done, budget}) {  // candidates of one number of tokens, some or all
  const {found} = shown.levels[level.number] ??= {k: level.k, found: []};
  found.push(...level.found);
  Object.assign(shown, {done, budget});
  const best = found.reduce((a, b) => b.score > a.score ? b : a);
  shown.frames.set(`${level.k}/${shown.seed}`, {k: level.k, url: best.url});  // until all is found
  show_levels();
}

function show_levels() {
  const orders = shown.levels.map(({found}) => found.map((_, i) => i).sort((a, b) => found[b].score - found[a].score));
  say('tree-title', `${shown.done} of ${shown.budget} candidates`);
  $('levels').replaceChildren(...shown.levels.map(({k, found}, n) => make('div', {},
    make('h3', {textContent: `With ${count(k)}`}),
    make('ol', {className: 'row'}, ...orders[n].map((i, place) => {
      const from = found[i].parent < 0 ? '' : `, continues no. ${orders[n - 1].indexOf(found[i].parent) + 1}`;
      const chosen = shown.path[n] === i;
      return make('li', {className: chosen ? 'chosen' : ''},
        make('img', {src: found[i].url, alt: `Candidate ${place + 1}${chosen ? ', chosen' : ''}`}),
        `${place + 1}: ${found[i].score.toFixed(2)}${from}`);
    })))));
}

function show_chips() {
  const {source} = shown;
  $('tokens').hidden = !shown.indices.length;
  const total = source.lengths.at(-1);  // a generator's are fewer than a picture's
  $('chips').replaceChildren(...shown.indices.slice(0, total).map((index, i) => make('li', {
    title: `token ${i + 1} of ${total}`}, make('b', {textContent: index}),
    make('i', {textContent: index.toString(2).padStart(source.bits, '0')}))));
}

function set(img, url) {
  if (url && img.getAttribute('src') !== url) img.src = url;
  img.style.visibility = img.hasAttribute('src') ? 'visible' : 'hidden';
}

function show() {
  const {source, mode, lengths, film} = shown;
  if (!source) return;
  const made = lengths.filter(k => frame(k));
  if (!made.length) return;
  $('view').setAttribute('aria-busy', 'false');
  $('open').setAttribute('aria-busy', !shown.frames.has(`${film[0]}/${shown.row.at(-1)}`) && !$('stop').disabled);
  $('tree').setAttribute('aria-busy', 'false');
  const k = nearest(made, wanted), one = frame(k), total = source.lengths.at(-1);
  set($('image'), one.url);
  const rest = mode === 'vary' ? `the other ${total - k} generated` : `the other ${total - k} of the second`;
  const caption = mode === 'look'
    ? (k < total ? `from the first ${k} of its ${total} tokens` : `from all ${total} tokens`)
    : (k < total ? `${count(k)} kept, ${rest}` : `all ${total} tokens kept`);
  $('image').alt = mode === 'look' ? `${shown.title}, decoded from ${count(k)}` : `${shown.title}: ${caption}`;
  say('caption', caption);
  for (const id of ['original', 'other']) set($(id).querySelector('img'), shown[id]);
  $('slider').value = lengths.indexOf(nearest(lengths, wanted));
  $('slider').setAttribute('aria-valuetext', `${k} of ${total}`);
  const bytes = Math.ceil(k * source.bits / 8), pixels = 3 * source.size ** 2;
  const facts = mode === 'blend' ? ['Later tokens repeat what the first ones determine: a mix changes late.'] :
    source.bits && mode === 'look' ? [`${count(k)} of ${source.bits} bits take ${bytes.toLocaleString('en')} ` +
    `bytes; the pixels take ${pixels.toLocaleString('en')}.`] : [];
  if (one.psnr !== undefined) facts.push(`Likeness to the picture: PSNR ${one.psnr.toFixed(1)} dB.`);
  if (one.sharp) facts.push(`Sharpness: ${one.sharp.toFixed(2)} of the picture's.`);
  say('facts', facts.join('\n'));
  [...$('film').children].forEach((item, i) => {
    set(item.querySelector('img'), frame(film[i])?.url);
    item.hidden = !frame(film[i]);
    const current = film[i] === nearest(film, k);
    if (current && !item.firstChild.hasAttribute('aria-current')) {  // a narrow page shows a part of the row
      $('film').scrollLeft = item.offsetLeft - $('film').offsetLeft - ($('film').clientWidth - item.offsetWidth) / 2;
    }
    item.firstChild.toggleAttribute('aria-current', current);
  });
  $('download').href = one.url;
  $('download').download = `flextok-${k}.png`;
  const few = nearest(film, k), map = shown.maps.get(few);
  say('open-title', MODES[mode].title(mode === 'look' ? `${count(few)} ${few === 1 ? 'leaves' : 'leave'}` : count(few)));
  [...$('seeds').children].forEach((figure, i) => {
    const image = figure.querySelector('img');
    image.removeAttribute('src');
    set(image, i < shown.row.length ? frame(few, shown.row[i])?.url : map?.url);
    if (i === shown.row.length && map) {
      figure.querySelector('figcaption').textContent = `what differs: ${map.mean.toFixed(0)} of 255 levels`;
    }
  });
  say('tokens-title', mode === 'look' ? `${k} of ${total} tokens` : `${k} of ${total} tokens are kept`);
  say('tokens-note', `Each token is one of ${source.vocabulary.toLocaleString('en')} numbers, below as ` +
    `${source.bits} bits. ` + (mode === 'look' ? 'The coloured ones make the image above.'
    : 'These are the tokens of the picture; the coloured ones are kept, the others are replaced.'));
  [...$('chips').children].forEach((chip, i) => {
    chip.classList.toggle('on', i < k);
    chip.ariaHidden = i < k ? null : 'true';
  });
}

// --- the form and the address ---------------------------------------------------------------------

function save() {
  const part = new URLSearchParams(new FormData(form)), task = value.task.value;
  for (const kind of ['class', 'prompt']) if (kind !== source.kind) part.delete(kind);
  for (const name of ['method', 'budget']) if (task !== 'search') part.delete(name);
  const used = {picture: source.kind === 'picture', kept: task === 'edit'};
  for (const [key, is] of Object.entries(used)) {
    if (is && !pictures[key].startsWith('data:')) part.set(key, pictures[key]);
    for (const one of $(key).querySelectorAll('button')) {
      one.setAttribute('aria-pressed', is && one.title === pictures[key]);
    }
  }
  part.set('k', wanted);
  if ($('pixels').checked) part.set('pixels', 1);
  history.replaceState(null, '', `#${part}`);
}

function choose() {  // what the task and the source that are checked need
  const task = value.task.value, radios = [...form.querySelectorAll('[name=source]')];
  for (const one of radios) {
    one.disabled = !sources[one.value].tasks.includes(task);
    one.parentElement.hidden = one.disabled;
  }
  const checked = radios.find(one => one.checked && !one.disabled) ?? radios.find(one => !one.disabled);
  checked.checked = true;
  source = sources[checked.value];
  for (const one of form.querySelectorAll('[class^=for-]')) {
    one.hidden = ![source.kind, task].some(name => one.classList.contains(`for-${name}`));
  }
  say('task', TASKS[task].note);
  say('from', TASKS[task].from);
  say('go', TASKS[task].go);
  const classes = task === 'edit' ? ['none', ...source.classes] : source.classes;
  const chosen = task === 'edit' ? 'none' : value.class.value;  // stays where it can
  value.class.replaceChildren(...classes.map(name => make('option', {textContent: name})));
  value.class.value = classes.includes(chosen) ? chosen : source.examples[0] ?? classes[0];
  $('suggestions').replaceChildren(...source.examples.map(text => make('button', {
    type: 'button', textContent: text, onclick: () => { value[source.kind].value = text; draw(); }})));
  if (source.kind === 'prompt' && task !== 'edit') value.prompt.value ||= source.examples[0] ?? '';
  $('settings').replaceChildren($('settings').firstElementChild, ...['decoding', 'sampling'].flatMap(group =>
    source.fields[group].map(one => make('label', {},
      `${group === 'decoding' ? 'Decoder' : 'Generator'} ${one.label}`,
      make('input', {type: 'number', name: `${group}.${one.name}`, required: true, value: one.value,
        min: one.low, max: one.high, step: one.name === 'num_steps' ? 1 : 'any'})))));
  say('about', `${source.name}: images of ${source.size} x ${source.size} pixels. ` + (source.own ? 'It was ' +
    'trained on emoji only: of other things it draws an emoji, or colours and rough shapes.' : ''));
}

function radio(group, name, number, label, checked) {
  const input = make('input', {type: 'radio', name, value: number, checked,
    onchange: () => { choose(); draw_if_asked(); }});
  $(group).append(make('label', {}, input, label));
}
for (const [task, {label}] of Object.entries(TASKS)) {
  if (sources.some(one => one.tasks.includes(task))) radio('tasks', 'task', task, label, task === 'look');
}
sources.forEach((one, i) => {
  const names = {picture: 'A picture', class: 'A class', prompt: 'A prompt', none: 'Nothing'};
  const same = sources.filter(other => other.kind === one.kind).length > 1;
  radio('sources', 'source', i, names[one.kind] + (same ? ` (${one.name})` : ''), !i);
});
for (const key of Object.keys(pictures)) {  // the examples, and a place for a file
  const pick = picture => { pictures[key] = picture; latest = key; draw(); };
  const file = make('input', {type: 'file', id: `${key}-file`, accept: 'image/*'});
  file.setAttribute('aria-describedby', 'error');
  file.onchange = () => { send(file.files[0], file, pick); file.value = ''; };
  const drop = make('label', {className: 'drop'}, 'Your own picture ',
    make('span', {className: 'note', textContent: 'Click to choose a file, or drop one here'}), file);
  for (const kind of ['dragover', 'dragleave', 'drop']) {
    drop.addEventListener(kind, event => {
      event.preventDefault();
      drop.classList.toggle('over', kind === 'dragover');
      if (kind === 'drop') send(event.dataTransfer.files[0], file, pick);
    });
  }
  $(key).append(make('div', {className: 'examples'}, ...Object.entries(examples).map(([name, url]) =>
    make('button', {type: 'button', title: name, onclick: () => pick(name)}, make('img', {src: url, alt: name})))), drop);
}

function send(file, field, pick) {
  if (!file) return;
  if (file.size > max_bytes) {
    const size = (file.size / 2 ** 20).toFixed(1);
    fail(`${file.name} is too large: ${size} MB, at most ${max_name}`, field);
    return;
  }
  const reader = new FileReader();
  reader.onload = () => pick(reader.result);
  reader.onerror = () => fail(`${file.name} cannot be read`, field);
  reader.readAsDataURL(file);
}
form.onsubmit = event => { event.preventDefault(); draw(); };
$('again').onclick = () => { value.seed.value = Number(value.seed.value) + 1; draw(); };
$('stop').onclick = () => { running.abort(); busy(false); show(); say('status', 'Stopped.'); };
$('settings').onchange = draw;
value.class.onchange = draw;
$('slider').oninput = () => {
  follows = false;
  wanted = shown.lengths[$('slider').value];
  show();
};
$('slider').onchange = save;
$('pixels').onchange = () => { document.body.classList.toggle('pixels', $('pixels').checked); save(); };

for (const one of form.querySelectorAll('[type=radio]')) one.checked ||= one.value === state.get(one.name);
choose();
for (const one of form.querySelectorAll('select, input[name]:not([type=radio])')) {
  const own = one.value;
  one.value = state.get(one.name) ?? own;
  if (!one.checkValidity() || (one.options && !one.value)) one.value = own;
}
for (const key of Object.keys(pictures)) if (examples[state.get(key)]) pictures[key] = state.get(key);
$('pixels').checked = state.has('pixels');
$('pixels').onchange();
draw_if_asked();
