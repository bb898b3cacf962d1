// @ts-nocheck: it runs in the browser, of which the app has no types.
import { demos } from './demos.mjs';
import { Pool } from './pool.mjs';
import { Timeline } from './timeline.mjs';

const $ = (selector, within = document) => within.querySelector(selector);
const timeline = new Timeline($('#timeline'));
const pool = new Pool($('#slots'), $('[data-waiting]'));

const STATES = { connecting: 'Connecting …', connected: 'Live', lost: 'Connection lost. Trying again …' };

function setState(state) {
  document.documentElement.dataset.live = state;
  $('#connection').textContent = STATES[state];
}

function connect() {
  const events = new EventSource('/live/events');
  events.addEventListener('hello', ({ data }) => {
    const { at, poolSize, requests } = JSON.parse(data);
    timeline.reset(at);
    pool.reset(poolSize);
    requests.forEach(show);
    setState('connected');
  });
  events.addEventListener('request', ({ data }) => show(JSON.parse(data)));
  events.addEventListener('error', () => {
    setState('lost');
    if (events.readyState === EventSource.CLOSED) setTimeout(connect, 1_000);
  });
}

function show(request) {
  pool.show(request, timeline.show(request));
}

function addDemo({ name, title, what, run }) {
  const card = $('#demo').content.cloneNode(true);
  const button = $('button', card);
  const output = $('output', card);
  button.dataset.demo = name;
  button.textContent = title;
  $('.what', card).textContent = what;
  output.dataset.result = name;
  const tell = (state, { client, database, why }) => {
    output.dataset.state = state;
    $('[data-client]', output).textContent = client;
    $('[data-database]', output).textContent = database;
    $('.why', output).textContent = why;
  };

  button.addEventListener('click', async () => {
    // Not `disabled`: that would take the focus away.
    if (button.ariaDisabled === 'true') return;
    button.ariaDisabled = 'true';
    tell('running', { client: '…', database: '…', why: '' });
    const result = await run((isWanted) => timeline.find(isWanted)).catch(({ message }) => ({
      client: 'nothing that it can tell',
      database: 'not looked at',
      why: `Something went wrong: ${message}`,
    }));
    tell('done', result);
    $('#lesson').textContent = `${title}. The client got ${result.client}; the database: ${result.database}. ${result.why}`;
    button.ariaDisabled = 'false';
  });
  $('#demos').append(card);
}

demos.forEach(addDemo);
connect();
