/* One app under test, in a process of its own. Tells its port, and on 'cpu' the CPU time that it has used. */
const [, app = '', settings = '{}'] = process.argv.slice(2);
const { start } = await import(`./${app}.mjs`);
/** @type {import('./listen.mjs').RunningApp} */
const { port, stop } = await start({ url: process.env['BENCH_DATABASE_URL'] ?? '', ...JSON.parse(settings) });

process.on('message', async (question) => {
  if (question === 'port') process.send?.({ port });
  else if (question === 'cpu') process.send?.(process.cpuUsage());
  else {
    await stop();
    process.disconnect();
  }
});
