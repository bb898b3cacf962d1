import { readdirSync, readFileSync } from 'node:fs';
import { describeFault, type Fault, matrix, moments, momentsOf } from './support/matrix';

const faults = Object.keys(matrix) as Fault[];

describe('the fault matrix', () => {
  it('has all its rows in the tests, each once', () => {
    const files = readdirSync(__dirname).filter((name) => /^matrix-.*\.test\.ts$/.test(name));
    const source = files.map((name) => readFileSync(`${__dirname}/${name}`, 'utf8')).join('\n');
    const described = [...source.matchAll(/^describeFault\('(.*)', \{$/gm)].map(([, fault]) => fault);
    expect(described.sort()).toEqual([...faults].sort());
    // None that is there, and does not run.
    expect(source).not.toMatch(/\b(it|test|describe)\.(skip|only|todo)\b|\bx(it|describe)\b/);
  });

  it('has 59 cells in 15 rows and 6 columns', () => {
    expect(faults).toHaveLength(15);
    expect(moments).toHaveLength(6);
    expect(faults.flatMap(momentsOf)).toHaveLength(59);
  });

  it('refuses a row without one of its cells, without a test in it, or with one that it has not', () => {
    const test = async () => {};
    const describeAnything = describeFault as (fault: Fault, cells: object) => void;
    expect(() => describeAnything('pool exhausted', {})).toThrow('pool exhausted, before BEGIN');
    expect(() => describeAnything('pool exhausted', { 'before BEGIN': {} })).toThrow('pool exhausted, before BEGIN');
    expect(() => describeAnything('pool exhausted', { 'before BEGIN': test, 'during COMMIT': test })).toThrow('during COMMIT');
  });
});
