/** The stack of whoever has called into this package, without its frames and those of other packages. */
export function stackOfCaller(): string {
  const { stackTraceLimit } = Error;
  Error.stackTraceLimit = 50;
  const frames = (new Error().stack ?? '').split('\n').slice(1);
  Error.stackTraceLimit = stackTraceLimit;
  const known = frames.filter((frame) => !/\bnode:|node_modules|(?:\(|at )<anonymous>/.test(frame));
  const others = OWN === undefined ? [] : known.filter((frame) => !frame.includes(OWN));
  // In a bundle, the application and this package are one file.
  return (others.length > 0 ? others : known).join('\n');
}

/** A bundle that is an ES module has none. */
const OWN = typeof __dirname === 'string' ? `${__dirname}/` : undefined;
