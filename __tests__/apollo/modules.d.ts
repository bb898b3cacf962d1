// Apollo Server is installed by tools/apollo.mjs, which compiles the recipe with its real types.
declare module '@apollo/server' {
  export const ApolloServer: unknown;
}
declare module '@as-integrations/express5' {
  export const expressMiddleware: unknown;
}
