/** The stack of whoever has called into this package, without its frames and those of other packages. */
export function stackOfCaller(): string {
  const { stackTraceLimit } = Error;
  Error.stackTraceLimit = 50;
  const frames = (new Error().stack ?? '').split('\n').slice(1);
  Error.stackTraceLimit = stackTraceLimit;
  return frames.filter((frame) => !/\bnode:|node_modules|(?:\(|at )<anonymous>/.test(frame) && !frame.includes(OWN)).join('\n');
}

const OWN = `${__dirname}/`;
