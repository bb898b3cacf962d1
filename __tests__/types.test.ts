import { typePrograms } from '../tools/packaging/type-programs';
import { TypeScript } from './support/typescript';

// `npm run packaging` compiles them against the packed tarball too, with other releases of TypeScript and every way to find modules.
const { app = {}, 'with-express-session': withExpressSession = {}, 'two-databases': twoDatabases = {} } = typePrograms();

let typescript: TypeScript;

beforeAll(async () => {
  typescript = await TypeScript.open();
});

afterAll(() => typescript.close());

const exact = { exactOptionalPropertyTypes: true };

describe('in a strict project that checks declarations too', () => {
  it.each([
    ['CommonJS', { compilerOptions: exact }],
    ['a bundler', { type: 'module' as const, compilerOptions: { ...exact, module: 'esnext', moduleResolution: 'bundler' } }],
    ['Express 4', { compilerOptions: exact, links: { '@types/express': '@types/express4', express: 'express4' } }],
  ])('types requests, sessions, options and errors, and refuses mistakes: %s', async (_case, project) => {
    expect(await typescript.compile({ ...project, files: app })).toBe('');
  });

  it('does so in an ESM project, and without exactOptionalPropertyTypes', async () => {
    expect(await typescript.compile({ type: 'module', files: app })).toBe('');
  });
});

describe('in a project with express-session', () => {
  it('types the registered property, and leaves req.session to express-session', async () => {
    expect(await typescript.compile({ files: withExpressSession })).toBe('');
  });

  const clash = "import 'express-session';\nimport 'express-knex-session';\n";

  it('says without Register that req.session cannot be both, if declarations are checked', async () => {
    const errors = await typescript.compile({ files: { 'clash.ts': clash } });
    expect(errors).toMatch(/Interface 'Request.*' incorrectly extends interface 'SessionOfRequest'/);
  });

  it('says so at the first query, if they are not', async () => {
    const query = "import type { Request } from 'express';\nexport const f = (req: Request) => req.session('users');\n";
    const errors = await typescript.compile({ compilerOptions: { skipLibCheck: true }, files: { 'clash.ts': clash + query } });
    expect(errors).toMatch(/clash\.ts\(4,\d+\).*This expression is not callable/);
  });
});

describe('in a project with two databases', () => {
  it('types both properties', async () => {
    expect(await typescript.compile({ files: twoDatabases })).toBe('');
  });
});
