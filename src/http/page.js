
'use strict';
(() => {
  const EVERY = 2000;
  const at = id => document.getElementById(id);

  // What cannot be seen, or turns the direction of what follows, must not rearrange the words beside it.
  const clean = text => String(text).replace(/[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u202a-\u202e\u2066-\u2069]/g, '\ufffd');
  const element = (tag, name, content) => {
    const made = document.createElement(tag);
    if (name) made.className = name;
    if (Array.isArray(content)) made.append(...content.filter(Boolean));
    else if (content !== undefined && content !== null) made.textContent = clean(content);
    return made;
  };
  const fill = (id, children) => at(id).replaceChildren(...children);
  const say = (id, text) => { at(id).textContent = text ? clean(text) : ''; };

  const number = value => value === null || value === undefined ? '–'
    : value.toLocaleString('en', { maximumFractionDigits: value >= 100 ? 0 : value >= 10 ? 1 : 2 });
  const percent = share => share > 0 && share < 0.005 ? '<1%' : `${Math.round(share * 100)}%`;
  const seconds = value => value === null || value === undefined ? '–'
    : value >= 100 ? `${Math.round(value)} s` : value >= 1 ? `${number(value)} s` : `${Math.round(value * 1000)} ms`;
  const bytes = value => value >= 1e9 ? `${number(value / 1e9)} GB` : value >= 1e6 ? `${number(value / 1e6)} MB`
    : value >= 1e3 ? `${number(value / 1e3)} kB` : `${number(value)} B`;
  const span = value => {
    const units = [[86400, 'd'], [3600, 'h'], [60, 'min'], [1, 's']];
    const place = Math.max(units.findIndex(([size]) => value >= size), 0);
    if (value < 1) return 'just now';
    const [size, unit] = units[place];
    const [next, small] = units[place + 1] || [0, ''];
    const rest = next ? Math.floor((value % size) / next) : 0;
    return `${Math.floor(value / size)} ${unit}${rest ? ` ${rest} ${small}` : ''}`;
  };
  const ago = time => {
    const past = (Date.now() - Date.parse(time)) / 1000;
    return past < 1 ? 'just now' : `${span(past)} ago`;
  };
  const moment = time => {
    const shown = element('time', '', ago(time));
    shown.dateTime = time;
    shown.title = time;
    return shown;
  };
  const times = (count, word) => `${number(count)} ${word}${count === 1 ? '' : 's'}`;

  const fact = (name, value, under) =>
    element('div', '', [element('dt', '', name), element('dd', 'value', value), element('dd', 'under', under)]);
  const bar = (name, share, text) => {
    const inside = element('span');
    inside.style.width = `${Math.min(Math.max(share, 0), 1) * 100}%`;
    const rail = element('div', 'rail', [inside]);
    return element('div', '', [element('dt', '', name), element('dd', '', [rail]), element('dd', 'number', text)]);
  };
  const pair = (name, value) => value ? element('div', '', [element('dt', '', name), element('dd', '', value)]) : null;

  const STEPS = [
    ['fetch', 'fetch from store'], ['queue', 'wait for decoder'], ['decode', 'decode'], ['wait', 'wait for batch'],
    ['embed', 'embed'], ['score', 'score on host'], ['publish', 'publish'],
  ];
  const WAITS = {
    fetch: 'Most of it goes into fetching: the store sets the pace.',
    decode: 'Most of it goes into decoding: the cores set the pace.',
    engine: 'Most of it goes into the engine: batching and the model set the pace.',
    publish: 'Most of it goes into publishing: the broker sets the pace.',
  };
  const REASONS = [['full', 'full'], ['linger', 'not full in time'], ['drain', 'draining']];

  const show = status => {
    const minute = status.last_minute;
    const counts = status.total;
    const backend = status.backend;
    document.title = `${status.ready ? '' : '⚠ '}${clean(status.worker || 'worker')} · angler`;
    say('worker', status.worker || 'worker');
    say('state', status.ready ? 'ready' : 'not ready');
    at('state').className = `state ${status.ready ? 'good' : 'bad'}`;
    say('why', status.missing);

    const failed = minute.failed_images_per_second;
    const size = backend && backend.max_batch;
    const latency = minute.job_seconds || {};
    fill('facts', [
      fact('images a second', number(minute.images_per_second), failed ? `${number(failed)} a second failed` : 'none failed'),
      fact('jobs a second', number(minute.jobs_per_second), `${number(status.in_flight.jobs)} in flight`),
      fact('half of the jobs within', seconds(latency.p50), 'p50'),
      fact('99% of the jobs within', seconds(latency.p99), 'p99'),
      fact('images in a batch', number(minute.mean_batch), size ? `of ${number(size)} at most` : ''),
      fact('back end busy', minute.sessions_busy === null ? '–' : percent(minute.sessions_busy), backend ? times(backend.sessions, 'session') : 'not loaded'),
    ]);

    say('waits', WAITS[minute.waits_for] || (minute.images_per_second ? 'Not known yet.' : 'No image in the last minute.'));
    const steps = minute.steps || {};
    fill('steps', STEPS.map(([step, name]) => bar(name, steps[step] || 0, percent(steps[step] || 0))));

    const recent = REASONS.map(([reason]) => minute.batches[reason]).reduce((a, b) => a + b, 0);
    const reasons = recent ? minute.batches : counts.batches;
    const all = REASONS.map(([reason]) => reasons[reason]).reduce((a, b) => a + b, 0);
    const when = recent ? 'in the last minute' : 'since the start';
    say('fill', all ? `Why ${times(all, 'batch').replace(/batchs$/, 'batches')} ${when} closed:` : 'No batch yet.');
    fill('batches', REASONS.map(([reason, name]) => bar(name, all ? reasons[reason] / all : 0, number(reasons[reason]))));

    at('no-classes').hidden = status.classes.length > 0;
    say('no-classes', 'None is loaded yet: a set is loaded with the first job that names it.');
    fill('classes', status.classes.slice(0, 100).map(set => element('li', '', [
      element('div', 'head', [
        element('b', '', `${set.set}@${set.version}`),
        element('span', '', ['since ', moment(set.since)]),
        element('span', '', `${times(set.rows, 'vector')}, ${bytes(set.bytes)}`),
        set.swaps ? element('span', '', times(set.swaps, 'swap')) : null,
      ]),
      set.refused ? element('div', 'more bad', [
        `${set.refused.version ? `version ${clean(set.refused.version)}` : 'active.json'} was refused `, moment(set.refused.at), `: ${clean(set.refused.reason)}`,
      ]) : null,
    ])));

    at('no-errors').hidden = status.errors.length > 0;
    say('no-errors', 'None since the start.');
    fill('errors', status.errors.map(error => element('li', '', [
      element('div', 'head', [
        element('b', 'bad', error.code),
        element('span', '', [moment(error.at)]),
        element('span', '', `${error.image ? 'image of job' : 'job'} ${error.job}`),
      ]),
      element('div', 'more', error.message),
      error.image ? element('div', 'quiet', error.image) : null,
    ])));

    fill('about', [
      pair('queue', status.queue),
      pair('broker', [...new Set(Object.values(status.brokers))].join(', ')),
      pair('back end', backend ? `${backend.name} on ${backend.devices.join(', ')}, scoring ${backend.scoring === 'graph' ? 'in the graph' : 'on the host'}` : 'not loaded yet'),
      backend && backend.batch_limit < backend.max_batch ? pair('batch limit', `${backend.batch_limit}, since a device was short of memory`) : null,
      pair('model', status.model),
      pair('fetched', `${bytes(minute.bytes_per_second)} a second`),
      pair('images', `${number(counts.images.labelled)} labelled, ${number(counts.images.unknown)} unknown, ${number(counts.images.failed)} failed since the start`),
      pair('jobs', `${number(counts.jobs.done)} done, ${number(counts.jobs.failed + counts.jobs.dead_lettered)} failed (${number(counts.jobs.dead_lettered)} of them kept as dead letters), ${number(counts.jobs.retried)} retried`),
      pair('up for', span(status.uptime_seconds)),
      pair('version', `angler ${status.version}`),
    ].filter(Boolean));
    at('main').hidden = false;
  };

  let good = Date.now();
  const look = async () => {
    if (!document.hidden) {
      try {
        const answer = await fetch('/status', { cache: 'no-store', signal: AbortSignal.timeout(5000) });
        if (!answer.ok) throw new Error(String(answer.status));
        show(await answer.json());
        good = Date.now();
        say('fresh', 'up to date');
      } catch {
        say('fresh', `no answer for ${span((Date.now() - good) / 1000)}`);
        say('state', 'no answer');
        at('state').className = 'state bad';
        say('why', 'The worker does not answer; below is what it said last.');
      }
    }
    setTimeout(look, EVERY);
  };

  show(JSON.parse(at('now').textContent));
  setTimeout(look, EVERY);
})();
